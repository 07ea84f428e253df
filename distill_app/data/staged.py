"""Examples in a scratch file: written once, in order, and read back a few columns at a time.

It is an Arrow file: what is written once and read a few times is not worth an encoding.
"""

from typing import TYPE_CHECKING

import numpy as np

from distill_app.data.engine import Database

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 2048


class Staged:
    """The rows that SQL gives, in order, and `n`, the number of each from 0."""

    def __init__(self, database: Database, name: str, sql: str) -> None:
        import pyarrow as pa

        self.path = database.scratch / f"{name}.arrow"
        self.rows = 0
        batches = database.connection.sql(sql).to_arrow_reader(BATCH_ROWS)
        schema = batches.schema.append(pa.field("n", pa.int64()))
        with pa.OSFile(str(self.path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                numbers = pa.array(np.arange(self.rows, self.rows + len(batch)))
                writer.write_batch(pa.record_batch([*batch.columns, numbers], schema=schema))
                self.rows += len(batch)
        self.columns = schema.names

    def read(self, *columns: str) -> "pa.RecordBatchReader":
        """Return a reader of these columns; others cost nothing."""
        import pyarrow as pa

        options = pa.ipc.IpcReadOptions(included_fields=[self.columns.index(column) for column in columns])
        file = pa.ipc.open_file(pa.OSFile(str(self.path)), options=options)  # a map would count as memory
        schema = pa.schema([file.schema.field(column) for column in columns])
        batches = (file.get_batch(at).select(columns) for at in range(file.num_record_batches))
        return pa.RecordBatchReader.from_batches(schema, batches)
