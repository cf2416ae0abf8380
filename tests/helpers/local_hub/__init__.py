"""A server on this machine that speaks the Hub's HTTP API, for tests.

The unmodified `huggingface_hub`, `transformers` and `datasets` clients drive it: [`LocalHub.environment`] gives a
process what it needs, the fixture `hub` connects the clients of the test's own process.

It has what they need to share and to load: `whoami`; repos of models, data sets and Spaces (create, info, settings,
move, delete, `auth-check`); branches, tags, pull requests (with a minimum of discussions), commits; `tree`,
`paths-info`, `resolve` with ranges and ETags; `preupload`, LFS batch (basic and multipart, verify) and `commit`; the
check of a card's metadata. Access follows tokens of read and write scope, private repos, and gated ones. It fails when
a test tells it to (`failures.py`).

What differs from the Hub: no Xet, so that clients need `HF_HUB_DISABLE_XET=1`; a commit's id is a hash of its content
and history alone, and its date is its number, so that the same pushes end in the same ids; a missing repo is a 401 or
404 that always says `RepoNotFound`, because the client infers that from a bare 401 for https addresses only; a commit
without a change makes none; no search, no likes, no jobs, no running Spaces, no data set viewer; and only the rules for
cards that `cards.py` lists.
"""

from .server import LocalHub

__all__ = ["LocalHub"]
