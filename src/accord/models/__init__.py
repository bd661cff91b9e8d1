"""Vision-language models: load any Hugging Face checkpoint, build and pre-train the small ones, batch their inputs."""
