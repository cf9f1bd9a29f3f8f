"""What a run needs on N machines, before it has any: memory, communication and time by formula and by tracing."""
