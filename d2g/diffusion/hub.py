"""Questions to the model hub that fetch nothing."""


def has_file(name: str, file: str) -> bool | None:
    """Whether a hub id has a file, here in the cache or on the hub; None where the hub cannot be reached."""
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    if isinstance(try_to_load_from_cache(name, file), str):
        return True
    try:
        return bool(file_exists(name, file))
    except GatedRepoError:
        return True
    except (HfHubHTTPError, OSError):
        return None
