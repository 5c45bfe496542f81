"""Workers: a Celery app, the supervisor of one engine process, the search, the reconciler."""
