"""The web app (extra `app`, Gradio): erase, try, library. `esd-fast app` starts it."""
