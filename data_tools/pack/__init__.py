"""From a folder or a table of images to shards: read rows, plan shards, check and write each, commit the manifest."""
