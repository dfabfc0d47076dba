"""Text and prompts: documents, chats, prompt sets, packed rows."""
