//! Offsets the probe needs: from the kernel's BTF for typed tracepoints, from tracefs for classic ones.
//!
//! Both are read anew for every recording: parsing the BTF of a distribution kernel takes a fraction of a second, and
//! a cache could outlive the kernel it describes.

use std::fs;
use std::path::{Path, PathBuf};

use btf::{Btf, Type};
use tdfs_common::abi::Offset;

use super::TracerError;

/// What the probe's constant `OFFSETS` is overridden with.
pub type Offsets = [u32; Offset::COUNT];

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// A field of a kernel structure, under the names it had over time. Kernels whose `mm_filemap_add_to_page_cache`
/// passes a `struct page` instead (before 5.16) have no folio with an order.
const FIELDS: [(Offset, &str, &[&str]); 11] = [
    (Offset::FolioFlags, "folio", &["flags"]),
    (Offset::FolioMapping, "folio", &["mapping"]),
    (Offset::FolioIndex, "folio", &["index"]),
    // Until 6.6 the order had a byte of its own, since then it is the low byte of the second page's flags.
    (Offset::FolioOrder, "folio", &["_folio_order", "_flags_1"]),
    (Offset::MappingHost, "address_space", &["host"]),
    (Offset::InodeIno, "inode", &["i_ino"]),
    (Offset::InodeSb, "inode", &["i_sb"]),
    (Offset::SbDev, "super_block", &["s_dev"]),
    (Offset::SockNum, "sock_common", &["skc_num"]),
    (Offset::BprmFilename, "linux_binprm", &["filename"]),
    (Offset::BprmInterp, "linux_binprm", &["interp"]),
];

/// Offsets for the BTF-typed programs.
pub fn typed() -> Result<Offsets, TracerError> {
    let missing = |what: &str| TracerError::Offset { what: what.to_owned(), place: VMLINUX.into() };
    if !Path::new(VMLINUX).exists() {
        return Err(missing("the kernel's types"));
    }
    let btf = Btf::from_file(VMLINUX).map_err(|e| missing(&format!("a known type format ({e})")))?;
    let mut offsets = [0; Offset::COUNT];
    for (slot, structure, names) in FIELDS {
        let members = members_of(&btf, structure).ok_or_else(|| missing(structure))?;
        let found = names.iter().find_map(|name| bit_offset(&btf, members, name, 0));
        let bits = found.ok_or_else(|| missing(&format!("{structure}.{}", names[0])))?;
        offsets[slot as usize] = bits / 8;
    }
    let head = btf.get_types().iter().find_map(|t| {
        let Type::Enum32(e) = &t.base_type else { return None };
        e.entries.iter().find(|e| e.name.as_deref() == Some("PG_head")).map(|e| e.value as u32)
    });
    offsets[Offset::PgHead as usize] = head.ok_or_else(|| missing("PG_head"))?;
    Ok(offsets)
}

/// Members of `struct name`; the same name may also belong to types of other kinds, or be declared only.
fn members_of<'a>(btf: &'a Btf, name: &str) -> Option<&'a [btf::StructMember]> {
    btf.get_types().iter().find_map(|t| match &t.base_type {
        Type::Struct(s) if t.num_refs == 0 && t.name.as_deref() == Some(name) && !s.members.is_empty() => {
            Some(s.members.as_slice())
        }
        _ => None,
    })
}

/// Bit offset of member `name`, also inside anonymous structures and unions.
fn bit_offset(btf: &Btf, members: &[btf::StructMember], name: &str, depth: u32) -> Option<u32> {
    members.iter().find_map(|m| {
        if m.name.as_deref().is_some_and(|n| !n.is_empty()) {
            return (m.name.as_deref() == Some(name)).then_some(m.offset);
        }
        let (Type::Struct(inner) | Type::Union(inner)) = &btf.get_type_by_id(m.type_id).ok()?.base_type
        else {
            return None;
        };
        if depth > 8 { None } else { Some(m.offset + bit_offset(btf, &inner.members, name, depth + 1)?) }
    })
}

/// A classic tracepoint, and the fields the probe reads of it.
type Record = (&'static str, &'static [(Offset, &'static str)]);

const RECORDS: [Record; 5] = [
    (
        "filemap/mm_filemap_add_to_page_cache",
        &[
            (Offset::AddedIno, "i_ino"),
            (Offset::AddedIndex, "index"),
            (Offset::AddedDev, "s_dev"),
            (Offset::AddedOrder, "order"),
        ],
    ),
    (
        "filemap/mm_filemap_get_pages",
        &[
            (Offset::ReadIno, "i_ino"),
            (Offset::ReadIndex, "index"),
            (Offset::ReadLast, "last_index"),
            (Offset::ReadDev, "s_dev"),
        ],
    ),
    (
        "filemap/mm_filemap_fault",
        &[(Offset::FaultIno, "i_ino"), (Offset::FaultIndex, "index"), (Offset::FaultDev, "s_dev")],
    ),
    (
        "sock/inet_sock_set_state",
        &[(Offset::StateNew, "newstate"), (Offset::StatePort, "sport"), (Offset::StateProtocol, "protocol")],
    ),
    ("sched/sched_process_exec", &[(Offset::ExecFilename, "filename")]),
];

/// Offsets for the classic programs. A tracepoint or field this kernel lacks keeps offset 0.
pub fn classic() -> Result<Offsets, TracerError> {
    let tracefs = tracefs()?;
    let mut offsets = [0; Offset::COUNT];
    for (name, fields) in RECORDS {
        let format = fs::read_to_string(tracefs.join("events").join(name).join("format")).unwrap_or_default();
        for (slot, field) in fields {
            offsets[*slot as usize] = field_offset(&format, field).unwrap_or(0);
        }
    }
    for required in [Offset::AddedIno, Offset::AddedIndex, Offset::AddedDev] {
        if offsets[required as usize] == 0 {
            return Err(TracerError::Offset { what: RECORDS[0].0.to_owned(), place: tracefs });
        }
    }
    Ok(offsets)
}

/// The offset of `field` in a tracefs format: `\tfield:unsigned long i_ino;\toffset:16;\tsize:8;\tsigned:0;`.
fn field_offset(format: &str, field: &str) -> Option<u32> {
    format.lines().find_map(|line| {
        let (declaration, rest) = line.trim_start().strip_prefix("field:")?.split_once(';')?;
        if declaration.split_whitespace().last()? != field {
            return None;
        }
        rest.trim_start().strip_prefix("offset:")?.split(';').next()?.parse().ok()
    })
}

/// Where tracefs is mounted; mounts it at its usual place if nobody has.
fn tracefs() -> Result<PathBuf, TracerError> {
    const USUAL: &str = "/sys/kernel/tracing";
    let mounted = |dir: &&str| Path::new(dir).join("events").is_dir();
    if let Some(dir) = [USUAL, "/sys/kernel/debug/tracing"].iter().find(|d| mounted(d)) {
        return Ok(dir.into());
    }
    nix::mount::mount(Some("tracefs"), USUAL, Some("tracefs"), nix::mount::MsFlags::empty(), None::<&str>)
        .map_err(|e| TracerError::Tracefs(e.into()))?;
    Ok(USUAL.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_of_a_tracefs_format() {
        let format = "name: x\nID: 1\nformat:\n\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
            \tfield:unsigned long i_ino;\toffset:16;\tsize:8;\tsigned:0;\n\
            \tfield:__data_loc char[] filename;\toffset:8;\tsize:4;\tsigned:0;\n\nprint fmt: \"i_ino\"\n";
        assert_eq!(field_offset(format, "i_ino"), Some(16));
        assert_eq!(field_offset(format, "filename"), Some(8));
        assert_eq!(field_offset(format, "order"), None);
    }
}
