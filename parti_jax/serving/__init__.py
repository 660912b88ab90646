"""Draws for other programs, over HTTP, and for people, on a page in the browser.

`image_service` queues and samples pictures for both. Only `http_server` needs the extra `serve`, and
only the package `ui` needs the extra of that name.
"""
