"""Generation over HTTP, in the form of OpenAI's completions. The one part that needs the extra `serve`."""
