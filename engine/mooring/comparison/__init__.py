"""Methods side by side: equal runs over seeds, their records, and what the records allow to say."""
