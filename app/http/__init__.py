"""What speaks HTTP: routes, schemas, errors, middleware."""
