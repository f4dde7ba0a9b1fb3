"""The bridges: each translates one dialect into another and knows no engine. Importing it imports no framework."""
