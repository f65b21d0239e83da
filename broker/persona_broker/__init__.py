"""The broker: decides which persona applies, keeps the documents, tells the guests when something changed."""
