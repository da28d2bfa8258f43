"""The trainer's parameter tree: any form of it, and each layer as if it were unscanned."""
