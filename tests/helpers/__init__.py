"""Parts of which tests are built: tiny models, servers, made-up runs, and checks that several files share."""
