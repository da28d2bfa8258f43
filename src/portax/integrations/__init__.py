"""What connects portax to real engines and trainers; each module imports its engine only when it is used."""
