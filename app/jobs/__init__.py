"""The life of a job: the domain. Knows neither HTTP nor Celery."""
