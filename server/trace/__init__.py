"""OpenTelemetry traces of generation requests. Off unless an endpoint is configured."""
