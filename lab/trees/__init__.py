"""Tree task of the experiments: views, instructions, answers, and scores of a pretraining on them."""
