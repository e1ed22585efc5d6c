"""A plan, run: its processes started and watched, its tokens checked, its times held against what was predicted."""
