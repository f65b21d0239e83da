"""The user's side of the guest: the login-shell interceptor and the persona command."""
