"""Serving: an engine behind the APIs of OpenAI and Anthropic, and a chat page."""

from linnet.serve.app import create_app
from linnet.serve.server import Server
from linnet.serve.settings import ServerSettings

__all__ = ["Server", "ServerSettings", "create_app"]
