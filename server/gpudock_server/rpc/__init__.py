"""gRPC: services, requests and messages, one package per resource."""
