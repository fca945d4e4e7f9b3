"""What commands show: tables, progress, JSON documents."""
