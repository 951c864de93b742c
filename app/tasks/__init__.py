"""The only place that knows Celery: messages in and out, and the event loop of a worker."""
