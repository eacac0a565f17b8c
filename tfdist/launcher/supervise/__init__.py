"""What keeps a job alive: who has died, frozen or hung, and what follows."""
