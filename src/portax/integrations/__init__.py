"""What connects portax to real engines and trainers; `import portax` imports none of it, and no other package."""
