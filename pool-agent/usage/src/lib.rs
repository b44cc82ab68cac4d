//! What a pool's pods used. Hosts keep [`account`]s and make [`record`]s of them, a
//! collector keeps the records, `spindrift usage` makes [`sum`]s.
//!
//! Pure: nothing here reads a clock, a file or a cgroup.
//!
//! What always holds:
//! - an attempt's records follow each other without a gap, in time and in number, and
//!   their sum is what the account was told, whatever came between;
//! - a record is named by (host, pod UID, attempt, sequence), and never changes once it
//!   is durable.

pub mod account;
pub mod line;
pub mod record;
pub mod sum;

pub use account::{Book, Carried, Claim, Reading};
pub use record::{Amounts, Began, Ended, Moment, Record, Start, Subject};
