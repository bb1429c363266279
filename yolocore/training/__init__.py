"""The pack of K slots and its trainer."""
