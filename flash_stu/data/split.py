"""The train/validation split of documents that come without one."""

import hashlib


def in_validation(document: str, fraction: float) -> bool:
    """Say whether a document is held out.

    The answer depends on the document's text alone: equal documents fall on the same side, whatever the
    order, the number of files or who reads them, and a larger fraction keeps every document of a smaller one.
    The hash is of our own kind, because corpora are sorted, sampled and split by the common ones.

    Args:
        document: the text.
        fraction: expected share of documents held out, between 0 and 1.
    """
    text = document.encode(errors="surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, person=b"flash-stu split").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
