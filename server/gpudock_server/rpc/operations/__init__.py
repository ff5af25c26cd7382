"""OperationService, and the stream of an operation that each mutation returns."""
