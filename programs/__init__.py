"""What a program says of itself: FLOPs by its trace; loops, bytes, collectives once compiled."""
