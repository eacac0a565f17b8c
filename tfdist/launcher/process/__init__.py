"""Processes of one machine: started, listened to, signalled, ended."""
