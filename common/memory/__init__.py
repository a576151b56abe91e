"""Guest RAM: its layout and holes, dirty bitmaps, the page codec, digests."""
