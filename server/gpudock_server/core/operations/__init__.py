"""The engine of every mutation: recorded operations, their sagas, and what drives them."""
