"""What drawing and learning share: a model's folder, its texts, words and networks, and the device they are on."""
