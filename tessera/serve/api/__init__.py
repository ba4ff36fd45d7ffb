"""An HTTP server with the OpenAI API over the built-in engine.

`words.py` says what a request may hold, `talk.py` turns it into tokens and tokens into pieces of
text, `replies.py` writes the API's JSON, `app.py` is the server, `run.py` its process.
"""
