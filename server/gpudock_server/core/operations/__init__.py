"""Operations: every mutation is a recorded operation, whose saga is driven step by step."""
