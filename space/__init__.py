"""The Gradio app, whose files import each other by bare names, as they do in a Space of the Hub."""
