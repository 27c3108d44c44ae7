"""What tests are built from: tiny models, servers, made-up runs, and checks that several files share."""
