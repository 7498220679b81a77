"""The owners of what the training loop keeps: timetable, saving, book, faults, and the account of the samples."""
