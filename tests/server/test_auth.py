from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from tests.server.conftest import Build
from tests.server.fakes import check_error

KEYS = ["first-key", "second-key"]
ROUTES = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"),
    ("GET", "/v1/models/collm-demo"),
    ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/metrics"), ("GET", "/version"), ("GET", "/docs"),
    ("GET", "/openapi.json"), ("GET", "/"), ("GET", "/static/app.js"), ("GET", "/nope"),
    ("OPTIONS", "/v1/completions"), ("HEAD", "/health/"),
    ("GET", "//health"), ("GET", "/ready/x"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_but_the_probes_asks_for_a_key(build: Build, method: str, path: str) -> None:
    house = await build(server={"api_keys": KEYS, "playground": "key"})
    response = await house.http.request(method, f"http://house{path}")
    if method != "HEAD":
        assert check_error(response, 401)["code"] == "invalid_api_key"
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    good = await house.http.request(method, f"http://house{path}", headers={"Authorization": "Bearer second-key"})
    assert good.status_code != 401


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Bearer first", "Bearer first-keyx", "Bearer FIRST-KEY", "Basic first-key", "first-key",
     "Bearer first-key second-key", "Bearer \u00e9"],
)  # fmt: skip
async def test_wrong_keys(build: Build, value: str) -> None:
    house = await build(server={"api_keys": KEYS})
    headers = {"Authorization": value.encode("latin-1")}
    check_error(await house.http.get("/v1/models", headers=headers), 401)


@pytest.mark.parametrize("key", KEYS)
async def test_right_keys(build: Build, key: str) -> None:
    house = await build(server={"api_keys": KEYS})
    for scheme in ("Bearer", "bearer"):
        response = await house.http.get("/v1/models", headers={"Authorization": f"{scheme} {key}"})
        assert response.status_code == 200


async def test_two_authorization_headers_are_none(build: Build) -> None:
    house = await build(server={"api_keys": KEYS})
    headers = [("Authorization", "Bearer first-key"), ("Authorization", "Bearer x")]
    check_error(await house.http.get("/v1/models", headers=headers), 401)


async def test_the_host_header_opens_nothing(build: Build) -> None:
    house = await build(server={"api_keys": KEYS})
    for host in ("x/health?", "x/health#", "/health", "house/ready?"):
        check_error(await house.http.get("/v1/models", headers={"Host": host}), 401)


async def test_probes_are_open(build: Build) -> None:
    house = await build(server={"api_keys": KEYS})
    assert (await house.http.get("/health")).status_code == 200
    assert (await house.http.get("/ready")).status_code == 200


PAGES = ["/", "/docs", "/static/app.js", "/static/style.css"]


@pytest.mark.parametrize("path", PAGES)
async def test_pages_open_to_everybody_and_ask_for_the_key_themselves(build: Build, path: str) -> None:
    house = await build(server={"api_keys": KEYS})
    response = await house.http.get(path)
    assert response.status_code == 200
    assert not any(key in response.text for key in KEYS)
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    assert response.headers["cache-control"] == "no-cache"
    again = await house.http.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code == 304) is path.startswith("/static/")


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route[1] not in PAGES])
async def test_open_pages_open_nothing_else(build: Build, method: str, path: str) -> None:
    house = await build(server={"api_keys": KEYS})
    assert (await house.http.request(method, f"http://house{path}")).status_code == 401


@pytest.mark.parametrize("path", ["/static", "/docs/", "//", "/static/../v1/models", "/static/%2e%2e/metrics"])
async def test_what_looks_like_a_page_is_none(build: Build, path: str) -> None:
    house = await build(server={"api_keys": KEYS})
    response = await house.http.get(f"http://house{path}")
    assert response.status_code in (401, 404)
    check_error(response, response.status_code)


async def test_a_browser_without_a_key_is_told_what_to_do(build: Build) -> None:
    house = await build(server={"api_keys": KEYS, "playground": "key"})
    assert 'server.playground = "open"' in check_error(await house.http.get("/"), 401)["message"]
    assert "playground" not in check_error(await house.http.get("/v1/models"), 401)["message"]


@pytest.mark.parametrize("path", PAGES)
async def test_pages_can_be_switched_off(build: Build, path: str) -> None:
    house = await build(server={"playground": "off"})
    check_error(await house.http.get(path), 404)


async def test_every_key_is_compared_in_constant_time(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    house = await build(server={"api_keys": KEYS})
    compared = []
    real = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr("server.auth.hmac.compare_digest", spy)
    await house.http.get("/v1/models", headers={"Authorization": "Bearer first-key"})
    assert compared == [(32, 32)] * 2


async def test_keys_from_a_file(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# those of the team\n\n  from-file  \nother\n")
    house = await build(server={"api_keys_file": file})
    for key, status in (("from-file", 200), ("other", 200), ("# those of the team", 401)):
        response = await house.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert response.status_code == status


async def test_cors(build: Build) -> None:
    house = await build(server={"cors_allow_origins": ["https://page.example"], "api_keys": KEYS})
    preflight = await house.http.options(
        "/v1/completions",
        headers={"Origin": "https://page.example", "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"},
    )  # fmt: skip
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://page.example"
    refused = await house.http.get("/v1/models", headers={"Origin": "https://page.example"})
    check_error(refused, 401)
    assert refused.headers["access-control-allow-origin"] == "https://page.example"
    other = await house.http.get("/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("origin", "method", "why"),
    [
        ("https://evil.example", "POST", "origin"),
        ("https://page.example", "DELETE", "method"),
        ("https://evil.example", "DELETE", "origin, method"),
    ],
)
async def test_a_preflight_that_is_refused(build: Build, origin: str, method: str, why: str) -> None:
    house = await build(server={"cors_allow_origins": ["https://page.example"]})
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    response = await house.http.options("/v1/completions", headers=headers)
    error = check_error(response, 400)
    assert (error["message"], error["code"]) == (f"Disallowed CORS {why}.", "cors_refused")
    assert response.headers["vary"].startswith("Origin")
    assert ("access-control-allow-origin" in response.headers) == ("origin" not in why)
    assert int(response.headers["content-length"]) == len(response.content)


async def test_without_origins_there_are_no_cors_headers(build: Build) -> None:
    house = await build()
    response = await house.http.get("/health", headers={"Origin": "https://page.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
