r"""String formats of JSON Schema, as regular expressions that every validator follows.

Validators differ in what they take: leap seconds, fractions of any length, years before 1, hosts of one label. A format
here is what all of them take, so it is narrower than its standard, and never wider.

Sources: RFC 3339 (date, time, duration in its appendix A), RFC 1123 (hostname), RFC 5322 (email), RFC 4291 (ipv6), RFC
3986 (uri), RFC 9562 (uuid).
"""

from __future__ import annotations

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = "(?:0[1-9]|1[0-9]|2[0-8])"
_MONTH_AND_DAY = f"(?:(?:0[13578]|1[02])-(?:{_DAY}|29|3[01])|(?:0[469]|11)-(?:{_DAY}|29|30)|02-{_DAY})"
_DATE = f"(?:{_YEAR}-{_MONTH_AND_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR = "(?:[01][0-9]|2[0-3])"
# Without leap seconds, which most clocks do not have, and with no finer fractions than most clocks have.
_TIME = f"{_HOUR}:[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{{1,6}})?(?:Z|[+-]{_HOUR}:[0-5][0-9])"
_COUNT = "[0-9]{1,6}"
_SECONDS = f"{_COUNT}S"
_MINUTES = f"{_COUNT}M(?:{_SECONDS})?"
_HOURS = f"{_COUNT}H(?:{_MINUTES})?"
_CLOCK = f"T(?:{_HOURS}|{_MINUTES}|{_SECONDS})"
_DAYS = f"{_COUNT}D"
_MONTHS = f"{_COUNT}M(?:{_DAYS})?"
_YEARS = f"{_COUNT}Y(?:{_MONTHS})?"
# Four labels of at most 59 characters are within the 253 of a name. The last one is no number, or it were an address.
_LABEL = "[A-Za-z0-9](?:-?[A-Za-z0-9]){0,29}"
_HOST = f"(?:{_LABEL}\\.){{1,3}}[A-Za-z](?:-?[A-Za-z0-9]){{1,29}}"
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = f"{_BYTE}(?:\\.{_BYTE}){{3}}"
_GROUP = "[0-9A-Fa-f]{1,4}"
_IPV6 = "|".join(
    [
        f"{_GROUP}(?::{_GROUP}){{7}}",
        *(f"(?:{_GROUP}:){{{before}}}(?::{_GROUP}){{1,{7 - before}}}" for before in range(1, 7)),
        f":(?::{_GROUP}){{1,7}}",
        f"(?:{_GROUP}:){{1,7}}:",
        "::",
    ]
)
_CHARACTER = "(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_URI = (
    f"[A-Za-z][A-Za-z0-9+.-]{{1,19}}:(?://(?:{_HOST}|{_IPV4})(?::[1-9][0-9]{{0,3}})?(?:/{_CHARACTER}*)*"
    f"|/?{_CHARACTER}+(?:/{_CHARACTER}*)*)(?:\\?(?:{_CHARACTER}|[/?])*)?(?:#(?:{_CHARACTER}|[/?])*)?"
)

FORMATS = {
    "date-time": f"{_DATE}T{_TIME}",
    "time": _TIME,
    "date": _DATE,
    "duration": f"P(?:(?:{_YEARS}|{_MONTHS}|{_DAYS})(?:{_CLOCK})?|{_CLOCK}|{_COUNT}W)",
    "email": f"{_ATOM}{{1,16}}(?:\\.{_ATOM}{{1,15}}){{0,3}}@{_HOST}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": f"(?:{_IPV6})",
    "uuid": "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": _URI,
}
"""By name; others are annotations."""
