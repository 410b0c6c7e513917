"""Generation over HTTP, in the form of OpenAI's completions; the one part that needs the extra `serve`."""
