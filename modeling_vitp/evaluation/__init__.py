"""Evaluation beyond one score: experiments over seeds."""
