"""Several ranks: what they send, how equal they are, how they scale, and what each holds."""
