//! The values of the rule language, one function each, shared by the one-line form and the config file.
//!
//! Each takes exactly the value's text and either returns it or says what is wrong with it. Must never look at a second
//! field: what holds between fields is in `check`.

use super::error::{Fault, did_you_mean};
use super::{EngineChoice, PathChoice, Prefix, SourceEdit, TagMatch, Ttl, VlanEdit};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

/// IFNAMSIZ − 1.
const INTERFACE_LEN: usize = 15;
const ID_LEN: usize = 64;

/// An interface name: what the kernel allows, less what the rule language needs for itself.
pub fn interface(field: &'static str, text: &str) -> Result<String, Fault> {
    let fault = |problem: String, hint: &str| Err(Fault::new(field, problem, hint));
    let refused = |c: char| c.is_whitespace() || c.is_control() || ",;=@[]#/:".contains(c);
    if text.is_empty() {
        return fault("interface name missing".into(), "such as eth0");
    }
    if let Some((at, c)) = text.char_indices().find(|(_, c)| refused(*c)) {
        let fault = Fault::new(
            field,
            format!("`{}` in an interface name", c.escape_default()),
            "rename the interface with `ip link set NAME name NEW`",
        );
        return Err(fault.shifted(at));
    }
    if text.contains("->") || text == "." || text == ".." {
        return fault(format!("`{text}` is no interface name here"), "rename the interface with `ip link set NAME name NEW`");
    }
    match text.len() {
        ..=INTERFACE_LEN => Ok(text.to_owned()),
        len => fault(format!("interface name of {len} bytes"), "at most 15"),
    }
}

/// A rule's name.
pub fn id(text: &str) -> Result<String, Fault> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    match text.len() {
        1..=ID_LEN if text.chars().all(allowed) => Ok(text.to_owned()),
        _ => Err(Fault::new("id", format!("`{text}` is no rule id"), "1 to 64 of A-Z a-z 0-9 . _ -")),
    }
}

/// A decimal number in a range. `such_as`: the remedy.
fn number<T: TryFrom<u64>>(field: &'static str, text: &str, range: RangeInclusive<u64>, such_as: &str) -> Result<T, Fault> {
    let digits = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    let value = digits.then(|| text.parse::<u64>().ok()).flatten().filter(|value| range.contains(value));
    let fault = || Fault::new(field, format!("`{text}` is not {such_as}"), format!("{} to {}", range.start(), range.end()));
    value.and_then(|value| T::try_from(value).ok()).ok_or_else(fault)
}

/// A port, 1–65535.
pub fn port(field: &'static str, text: &str) -> Result<u16, Fault> {
    match text {
        "0" => Err(Fault::new(field, "port 0 is never used", "leave the port out for any port")),
        _ if text.contains('-') => {
            Err(Fault::new(field, "port ranges don't exist", "one rule per port, or leave the port out for any port"))
        }
        _ => number(field, text, 1..=65535, "a port"),
    }
}

/// `ADDR[/LEN][:PORT]` cut into its parts, each with its offset; an IPv6 address still in its brackets.
struct Parts<'a> {
    addr: &'a str,
    len: Option<(usize, &'a str)>,
    port: Option<(usize, &'a str)>,
}

impl<'a> Parts<'a> {
    fn cut(field: &'static str, text: &'a str) -> Result<Self, Fault> {
        let addr_len = match text.starts_with('[') {
            true => text.find(']').map(|at| at + 1).ok_or_else(|| Fault::new(field, "`[` without `]`", "write [ADDR]"))?,
            false => text.find(['/', ':']).unwrap_or(text.len()),
        };
        let (addr, tail) = text.split_at(addr_len);
        if !text.starts_with('[') && tail.matches(':').count() > 1 {
            return Err(Fault::new(field, "IPv6 address without brackets", format!("write [{text}]")));
        }
        let (len, port) = match tail.split_once(':') {
            Some((len, port)) => (len, Some((text.len() - port.len(), port))),
            None => (tail, None),
        };
        match (len.strip_prefix('/'), len) {
            (Some(digits), _) => Ok(Self { addr, len: Some((addr_len + 1, digits)), port }),
            (None, "") => Ok(Self { addr, len: None, port }),
            (None, junk) => Err(Fault::new(field, format!("`{junk}` after the address"), "ADDR[/LEN][:PORT]").shifted(addr_len)),
        }
    }

    fn prefix(&self, field: &'static str) -> Result<Prefix, Fault> {
        let addr = address(field, self.addr)?;
        let Some((at, digits)) = self.len else { return Ok(Prefix::host(addr)) };
        let max = super::prefix::full_len(addr);
        let len = number(field, digits, 0..=u64::from(max), "a prefix length").map_err(|fault| fault.shifted(at))?;
        let prefix = Prefix::new(addr, len);
        match prefix.addr == addr {
            true => Ok(prefix),
            false => Err(Fault::new(field, format!("address bits behind /{len}"), format!("write {}", Full(&prefix)))),
        }
    }

    fn port(&self, field: &'static str) -> Result<Option<u16>, Fault> {
        self.port.map(|(at, digits)| port(field, digits).map_err(|fault| fault.shifted(at))).transpose()
    }
}

/// An address: IPv4 as it is, IPv6 in brackets.
pub fn address(field: &'static str, text: &str) -> Result<IpAddr, Fault> {
    let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let parsed = match bracketed {
        Some(inner) => inner.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        None => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
    };
    parsed.ok_or_else(|| match text.parse::<Ipv6Addr>() {
        Ok(_) => Fault::new(field, "IPv6 address without brackets", format!("write [{text}]")),
        Err(_) => Fault::new(field, format!("`{text}` is no address"), "such as 239.1.1.1 or [ff3e::1]"),
    })
}

/// `ADDR[/LEN]`.
pub fn prefix(field: &'static str, text: &str) -> Result<Prefix, Fault> {
    let parts = Parts::cut(field, text)?;
    match parts.port {
        Some((at, _)) => Err(Fault::new(field, "a port has no place here", "ADDR[/LEN]").shifted(at)),
        None => parts.prefix(field),
    }
}

/// What stands between ingress and arrow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatchValue {
    /// Group or unicast address.
    pub group: Prefix,
    /// Destination port.
    pub port: Option<u16>,
    /// Source; a source of length 0 is none.
    pub source: Option<Prefix>,
    /// Bytes from the start of the value to the group.
    pub group_at: usize,
}

/// `[SRC[/LEN]@]GROUP[/LEN][:PORT]`.
pub fn matching(text: &str) -> Result<MatchValue, Fault> {
    let (source, group) = match text.split_once('@') {
        Some((source, group)) => (Some(source), group),
        None => (None, text),
    };
    let source = source.map(|text| prefix("source", text)).transpose()?;
    let group_at = text.len() - group.len();
    let shift = |fault: Fault| fault.shifted(group_at);
    let parts = Parts::cut("group", group).map_err(shift)?;
    let value = MatchValue { group: parts.prefix("group").map_err(shift)?, port: parts.port("port").map_err(shift)?, source, group_at };
    // Families are compared with the length-0 source still there.
    match source {
        Some(source) if source.family() != value.group.family() => Err(families("source")),
        Some(Prefix { len: 0, .. }) => Ok(MatchValue { source: None, ..value }),
        _ => Ok(value),
    }
}

/// Two addresses of one rule of different families.
pub(super) fn families(field: &'static str) -> Fault {
    Fault::new(field, "not of the match's address family", "IPv4 and IPv6 don't mix within a rule")
}

/// `[ADDR][:PORT]` of an output.
pub fn destination(text: &str) -> Result<(Option<IpAddr>, Option<u16>), Fault> {
    if let Some(digits) = text.strip_prefix(':') {
        return Ok((None, Some(port("to", digits).map_err(|fault| fault.shifted(1))?)));
    }
    let parts = Parts::cut("to", text)?;
    if let Some((at, _)) = parts.len {
        return Err(Fault::new("to", "an output has one address, no prefix", "ADDR[:PORT]").shifted(at - 1));
    }
    Ok((Some(address("to", parts.addr)?), parts.port("to")?))
}

/// `tag=none|any|ID[.ID]`.
pub fn tag(text: &str) -> Result<TagMatch, Fault> {
    let id = |text| number("tag", text, 1..=4094, "none, any, or a VLAN id");
    match (text, text.split_once('.')) {
        ("none", _) => Ok(TagMatch::None),
        ("any", _) => Ok(TagMatch::Any),
        (_, Some((outer, inner))) => Ok(TagMatch::QinQ(id(outer)?, id(inner)?)),
        (_, None) => Ok(TagMatch::Vlan(id(text)?)),
    }
}

/// `ttl=dec|keep|N`.
pub fn ttl(text: &str) -> Result<Ttl, Fault> {
    match text {
        "dec" => Ok(Ttl::Dec),
        "keep" => Ok(Ttl::Keep),
        _ => number("ttl", text, 1..=255, "dec, keep, or a TTL").map(Ttl::Set),
    }
}

/// `src=keep|egress|ADDR`.
pub fn source_edit(text: &str) -> Result<SourceEdit, Fault> {
    match text {
        "keep" => Ok(SourceEdit::Keep),
        "egress" => Ok(SourceEdit::Egress),
        _ => address("src", text).map(SourceEdit::Set),
    }
}

/// `sport=keep|N`.
pub fn source_port(text: &str) -> Result<Option<u16>, Fault> {
    if text == "keep" { Ok(None) } else { port("sport", text).map(Some) }
}

/// `dscp=keep|N`.
pub fn dscp(text: &str) -> Result<Option<u8>, Fault> {
    if text == "keep" { Ok(None) } else { number("dscp", text, 0..=63, "keep or a DSCP").map(Some) }
}

/// `vlan=keep|none|ID`.
pub fn vlan(text: &str) -> Result<VlanEdit, Fault> {
    match text {
        "keep" => Ok(VlanEdit::Keep),
        "none" => Ok(VlanEdit::None),
        _ => number("vlan", text, 1..=4094, "keep, none, or a VLAN id").map(VlanEdit::Set),
    }
}

/// `rate=N[kM]pps`, at least 1.
pub fn rate(text: &str) -> Result<u64, Fault> {
    let fault = || Fault::new("rate", format!("`{text}` is no rate"), "such as 500pps, 20kpps or 1Mpps");
    let count = text.strip_suffix("pps").ok_or_else(fault)?;
    let (digits, unit) = match (count.strip_suffix('k'), count.strip_suffix('M')) {
        (Some(digits), _) => (digits, 1_000),
        (_, Some(digits)) => (digits, 1_000_000),
        _ => (count, 1),
    };
    let value: u64 = number("rate", digits, 1..=u64::MAX, "a rate").map_err(|_| fault())?;
    value.checked_mul(unit).ok_or_else(fault)
}

fn choice<T: Copy>(field: &'static str, text: &str, choices: &[(&'static str, T)]) -> Result<T, Fault> {
    let found = choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
    let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
    found.ok_or_else(|| Fault::new(field, format!("`{text}` is none of {}", names.join(", ")), did_you_mean(text, &names)))
}

const PATHS: [(&str, PathChoice); 4] =
    [("auto", PathChoice::Auto), ("kernel", PathChoice::Kernel), ("xsk", PathChoice::Xsk), ("packet", PathChoice::Packet)];
const ENGINES: [(&str, EngineChoice); 3] = [("auto", EngineChoice::Auto), ("tx", EngineChoice::Tx), ("coalesce", EngineChoice::Coalesce)];

/// `path=`.
pub fn path(text: &str) -> Result<PathChoice, Fault> {
    choice("path", text, &PATHS)
}

/// `engine=`.
pub fn engine(text: &str) -> Result<EngineChoice, Fault> {
    choice("engine", text, &ENGINES)
}

/// `yes` or `no`.
pub fn yes_no(field: &'static str, text: &str) -> Result<bool, Fault> {
    choice(field, text, &[("yes", true), ("no", false)])
}

/// An address as the rule language writes it: IPv6 in brackets.
pub struct Bracketed(
    /// The address.
    pub IpAddr,
);

impl fmt::Display for Bracketed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(addr) => write!(f, "{addr}"),
            IpAddr::V6(addr) => write!(f, "[{addr}]"),
        }
    }
}

/// A prefix with its length even where it is one address.
struct Full<'a>(&'a Prefix);

impl fmt::Display for Full<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Bracketed(self.0.addr), self.0.len)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_host() { write!(f, "{}", Bracketed(self.addr)) } else { write!(f, "{}", Full(self)) }
    }
}

impl fmt::Display for TagMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Any => f.write_str("any"),
            Self::Vlan(id) => write!(f, "{id}"),
            Self::QinQ(outer, inner) => write!(f, "{outer}.{inner}"),
        }
    }
}

impl fmt::Display for Ttl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dec => f.write_str("dec"),
            Self::Keep => f.write_str("keep"),
            Self::Set(ttl) => write!(f, "{ttl}"),
        }
    }
}

impl fmt::Display for SourceEdit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep => f.write_str("keep"),
            Self::Egress => f.write_str("egress"),
            Self::Set(addr) => write!(f, "{}", Bracketed(*addr)),
        }
    }
}

impl fmt::Display for VlanEdit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep => f.write_str("keep"),
            Self::None => f.write_str("none"),
            Self::Set(id) => write!(f, "{id}"),
        }
    }
}

impl fmt::Display for PathChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(*self, &PATHS))
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(*self, &ENGINES))
    }
}

fn name_of<T: PartialEq>(value: T, choices: &[(&'static str, T)]) -> &'static str {
    choices.iter().find(|(_, choice)| *choice == value).map_or("auto", |(name, _)| name)
}

/// A rate in the largest unit that keeps it whole.
pub struct RateText(
    /// Packets per second.
    pub u64,
);

impl fmt::Display for RateText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            rate if rate % 1_000_000 == 0 => write!(f, "{}Mpps", rate / 1_000_000),
            rate if rate % 1_000 == 0 => write!(f, "{}kpps", rate / 1_000),
            rate => write!(f, "{rate}pps"),
        }
    }
}

/// A destination `[ADDR][:PORT]`; nothing where both are unchanged.
pub struct DestinationText(
    /// Address.
    pub Option<IpAddr>,
    /// Port.
    pub Option<u16>,
);

impl fmt::Display for DestinationText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(addr) = self.0 {
            write!(f, "{}", Bracketed(addr))?;
        }
        self.1.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}
