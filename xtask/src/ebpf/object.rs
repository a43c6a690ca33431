//! Reads a BPF object's facts: programs with their sections, maps with their full BTF layout.
//!
//! Enough ELF (64-bit, little-endian) and BTF (kernel doc `bpf/btf.rst`) to compare two objects of different
//! compilers. Must never panic: every read is checked.

use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;

const STT_FUNC: u8 = 2;
const STB_GLOBAL: u8 = 1;

/// One line per fact, so that two objects can be compared as sets.
pub(crate) fn describe(bytes: &[u8]) -> Result<BTreeSet<String>> {
    let elf = Elf::parse(bytes)?;
    let mut facts = elf.programs()?;
    facts.extend(Btf::parse(elf.section(".BTF")?)?.maps()?);
    Ok(facts)
}

fn slice(bytes: &[u8], at: usize, len: usize) -> Result<&[u8]> {
    at.checked_add(len).and_then(|end| bytes.get(at..end)).with_context(|| format!("the object ends before byte {at}+{len}"))
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<usize> {
    let mut word = [0; 8];
    word[..N].copy_from_slice(slice(bytes, at, N)?);
    Ok(usize::try_from(u64::from_le_bytes(word))?)
}

fn text(bytes: &[u8], at: usize) -> Result<&str> {
    let tail = bytes.get(at..).context("a name beyond its table")?;
    Ok(std::str::from_utf8(tail.split(|&byte| byte == 0).next().unwrap_or_default())?)
}

struct Section<'a> {
    name: &'a str,
    bytes: &'a [u8],
    link: usize,
}

struct Elf<'a>(Vec<Section<'a>>);

impl<'a> Elf<'a> {
    /// ELF64 header: section headers at 0x28, their size, count and the names' index from 0x3a.
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        if slice(bytes, 0, 6)? != b"\x7fELF\x02\x01" {
            bail!("not a 64-bit little-endian ELF object");
        }
        let (table, size) = (number::<8>(bytes, 0x28)?, number::<2>(bytes, 0x3a)?);
        let (count, names) = (number::<2>(bytes, 0x3c)?, number::<2>(bytes, 0x3e)?);
        let header = |index: usize| slice(bytes, table.saturating_add(index * size), 64);
        let body = |header: &[u8]| slice(bytes, number::<8>(header, 24)?, number::<8>(header, 32)?);
        let names = body(header(names)?)?;
        let section = |index| {
            let header = header(index)?;
            Ok(Section { name: text(names, number::<4>(header, 0)?)?, bytes: body(header)?, link: number::<4>(header, 40)? })
        };
        Ok(Self((0..count).map(section).collect::<Result<_>>()?))
    }

    fn section(&self, name: &str) -> Result<&'a [u8]> {
        Ok(self.0.iter().find(|section| section.name == name).with_context(|| format!("no section {name}"))?.bytes)
    }

    /// Global functions of the program sections.
    fn programs(&self) -> Result<BTreeSet<String>> {
        let symbols = self.0.iter().find(|section| section.name == ".symtab").context("no symbols")?;
        let names = self.0.get(symbols.link).context("no symbol names")?.bytes;
        let mut found = BTreeSet::new();
        for symbol in symbols.bytes.chunks_exact(24) {
            let section = self.0.get(number::<2>(symbol, 6)?).map_or("", |section| section.name);
            if symbol[4] == STB_GLOBAL << 4 | STT_FUNC && section.starts_with("xdp") {
                found.insert(format!("program {} in {section}", text(names, number::<4>(symbol, 0)?)?));
            }
        }
        Ok(found)
    }
}

/// One BTF type: its kind, name, the third header word (size or type), and what follows the header.
struct Type<'a> {
    kind: usize,
    name: &'a str,
    word: usize,
    tail: &'a [u8],
}

struct Btf<'a> {
    types: Vec<Type<'a>>,
    names: &'a [u8],
}

impl<'a> Btf<'a> {
    /// Header: magic, lengths and offsets of the type and string parts (from the header's end) from byte 8.
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        if number::<2>(bytes, 0)? != 0xeb9f {
            bail!("no BTF");
        }
        let header = number::<4>(bytes, 4)?;
        let part = |at: usize| slice(bytes, header.saturating_add(number::<4>(bytes, at)?), number::<4>(bytes, at + 4)?);
        let (mut rest, names) = (part(8)?, part(16)?);
        let mut types = vec![Type { kind: 0, name: "void", word: 0, tail: &[] }];
        while !rest.is_empty() {
            let info = number::<4>(rest, 4)?;
            let (kind, count) = (info >> 24 & 0x1f, info & 0xffff);
            let tail = slice(rest, 12, tail_len(kind, count)?)?;
            types.push(Type { kind, name: text(names, number::<4>(rest, 0)?)?, word: number::<4>(rest, 8)?, tail });
            rest = slice(rest, 12 + tail.len(), rest.len() - 12 - tail.len())?;
        }
        Ok(Self { types, names })
    }

    /// Every variable of section `.maps`, its definition written out.
    fn maps(&self) -> Result<BTreeSet<String>> {
        let Some(maps) = self.types.iter().find(|ty| ty.kind == DATASEC && ty.name == ".maps") else { return Ok(BTreeSet::new()) };
        let variable = |entry: &[u8]| {
            let variable = self.get(number::<4>(entry, 0)?)?;
            Ok(format!("map {}: {}", variable.name, self.written(variable.word, 0)?))
        };
        maps.tail.chunks_exact(12).map(variable).collect()
    }

    fn get(&self, id: usize) -> Result<&Type<'a>> {
        self.types.get(id).with_context(|| format!("no BTF type {id}"))
    }

    /// A type as text, members and offsets included. The names of a map's own type hold compiler-made escapes: left out.
    fn written(&self, id: usize, depth: usize) -> Result<String> {
        let ty = self.get(id)?;
        if depth > MAX_DEPTH {
            return Ok(ty.name.to_owned());
        }
        Ok(match ty.kind {
            INT => format!("{}({})", ty.name, ty.word),
            PTR => format!("*{}", self.written(ty.word, depth + 1)?),
            ARRAY => format!("[{}; {}]", self.written(number::<4>(ty.tail, 0)?, depth + 1)?, number::<4>(ty.tail, 8)?),
            STRUCT | UNION => self.members(ty, depth)?,
            _ => format!("{} of kind {}", ty.name, ty.kind),
        })
    }

    fn members(&self, ty: &Type<'_>, depth: usize) -> Result<String> {
        let name = if depth == 0 { "" } else { ty.name };
        let member = |entry: &[u8]| {
            let (field, at) = (text(self.names, number::<4>(entry, 0)?)?, number::<4>(entry, 8)?);
            Ok(format!("{field}@{at}: {}", self.written(number::<4>(entry, 4)?, depth + 1)?))
        };
        let members: Vec<_> = ty.tail.chunks_exact(12).map(member).collect::<Result<_>>()?;
        Ok(format!("{name}({}) {{ {} }}", ty.word, members.join(", ")))
    }
}

const INT: usize = 1;
const PTR: usize = 2;
const ARRAY: usize = 3;
const STRUCT: usize = 4;
const UNION: usize = 5;
const DATASEC: usize = 15;
/// Deeper than any map's definition.
const MAX_DEPTH: usize = 12;

/// Bytes that follow a type's header (kernel doc `bpf/btf.rst`).
fn tail_len(kind: usize, count: usize) -> Result<usize> {
    Ok(match kind {
        INT | 14 | 17 => 4,
        ARRAY => 12,
        STRUCT | UNION | DATASEC | 19 => 12 * count,
        6 | 13 => 8 * count,
        PTR | 7..=12 | 16 | 18 => 0,
        _ => bail!("BTF kind {kind} is unknown"),
    })
}
