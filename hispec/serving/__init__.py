"""An HTTP server with the API of OpenAI: schemas, scheduler, app, metrics, playground."""
