"""`python -m benchmarks.simulator`: a recorded day of 36 contracts, replayed as fast as it goes, asked and heard by a client.

The simulator is a process of its own, as users start it (`xsmom exchange simulate --mode stepped`). The client is registered with
its clock: it asks, then allows the next minute. Every contract is heard on two topics, and the account on four; it trades now and
then. The goals: a day in 180 s, 300 requests a second, and at most 5 % more memory at hour 24 than at hour 6.
"""

import argparse
import asyncio
import hashlib
import hmac
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp

KEY, SECRET = "benchmark-key", "benchmark-secret"
MINUTE = 60_000
XSMOM = Path(sys.executable).with_name("xsmom")


class Client:
    "Asks and listens, in the simulator's time."

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url, self.http, self.now_ms = url, http, 0
        self.requests, self.messages, self.refused = 0, 0, Counter[int]()

    async def side(self, name: str, **parameters: Any) -> dict[str, Any]:
        "The side channel; not counted."
        async with self.http.post(f"{self.url}/__sim/{name}", json=parameters) as answer:
            told: dict[str, Any] = await answer.json()
        self.now_ms = int(told.get("now_ms", self.now_ms))
        return told

    def signed(self, text: str) -> dict[str, str]:
        "The headers that prove who asks."
        payload = f"{self.now_ms}{KEY}5000{text}"
        sign = hmac.new(SECRET.encode(), payload.encode(), hashlib.sha256).hexdigest()
        return {"X-BAPI-API-KEY": KEY, "X-BAPI-TIMESTAMP": str(self.now_ms), "X-BAPI-RECV-WINDOW": "5000", "X-BAPI-SIGN": sign}

    async def get(self, path: str, query: str, signed: bool = False) -> dict[str, Any]:
        "A question."
        async with self.http.get(f"{self.url}/v5/{path}?{query}", headers=self.signed(query) if signed else {}) as answer:
            return self.counted(await answer.json())

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        "An order."
        text = json.dumps(body)
        headers = {**self.signed(text), "Content-Type": "application/json"}
        async with self.http.post(f"{self.url}/v5/{path}", data=text, headers=headers) as answer:
            return self.counted(await answer.json())

    def counted(self, answer: dict[str, Any]) -> dict[str, Any]:
        self.requests += 1
        if answer["retCode"]:
            self.refused[answer["retCode"]] += 1
        return answer

    async def listen(self, path: str, topics: list[str]) -> None:
        "Hear a socket until it ends."
        async with self.http.ws_connect(self.url.replace("http", "ws") + path) as line:
            if "private" in path:
                expires = self.now_ms + 10_000
                sign = hmac.new(SECRET.encode(), f"GET/realtime{expires}".encode(), hashlib.sha256).hexdigest()
                await line.send_json({"op": "auth", "args": [KEY, expires, sign]})
            await line.send_json({"op": "subscribe", "args": topics})
            async for message in line:
                self.messages += "topic" in json.loads(message.data)

    async def minute(self, number: int, symbols: list[str]) -> None:
        "What a client asks in a minute: a public and a signed question in turn, about one contract after another."
        one, other = (symbols[(2 * number + i) % len(symbols)] for i in (0, 1))
        linear, coin = "category=linear", "category=linear&settleCoin=USDT"
        public = [("market/kline", f"{linear}&symbol={one}&interval=60&limit=24"), ("market/tickers", f"{linear}&symbol={one}"),
                  ("market/orderbook", f"{linear}&symbol={other}&limit=50"), ("market/time", ""),
                  ("market/recent-trade", f"{linear}&symbol={other}&limit=50"), ("market/tickers", linear)]
        private = [("order/realtime", f"{coin}&limit=50"), ("account/wallet-balance", "accountType=UNIFIED"),
                   ("position/list", f"{coin}&limit=200"), ("execution/list", f"{linear}&limit=100")]
        await asyncio.gather(*(self.get(*each) for each in public * 2), *(self.get(*each, signed=True) for each in private * 3))
        if number % 5 == 0:
            side = "Buy" if number % 10 else "Sell"
            symbol, name = symbols[number // 10 % len(symbols)], f"bench-{number}"
            order = {"symbol": symbol, "side": side, "orderType": "Market", "qty": "10", "orderLinkId": name}
            await self.post("order/create", category="linear", **order)


def memory_mb(process: subprocess.Popen[str]) -> float:
    "What a process holds in memory."
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def processor_seconds(process: subprocess.Popen[str]) -> float:
    "What a process has computed, user and system."
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[Client, list[str]]]:
    "A client that listens, and the contracts."
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=8)) as http, aiohttp.ClientSession() as lines:
        client = Client(url, http)
        await client.side("register", process="benchmark")
        rows = (await client.get("market/instruments-info", "category=linear&limit=1000"))["result"]["list"]
        symbols = [row["symbol"] for row in rows]
        ears = Client(url, lines)
        ears.now_ms = client.now_ms
        topics = [f"{topic}.{symbol}" for symbol in symbols for topic in ("kline.60", "tickers")]
        tasks = [asyncio.create_task(ears.listen("/v5/public/linear", topics)),
                 asyncio.create_task(ears.listen("/v5/private", ["order", "execution", "position", "wallet"]))]
        await asyncio.sleep(0.5)
        try:
            yield client, symbols
            client.messages = ears.messages
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def replayed(process: subprocess.Popen[str], url: str, hours: int) -> dict[str, Any]:
    "Some hours, and what they took."
    memory: dict[int, float] = {}
    async with connected(url) as (client, symbols):
        begin, computed = time.perf_counter(), processor_seconds(process)
        for number in range(hours * 60):
            await client.minute(number, symbols)
            until = client.now_ms + MINUTE
            await client.side("permit", process="benchmark", until_ms=until)
            while client.now_ms < until:
                await client.side("clock")
            if (number + 1) % 60 == 0:
                memory[(number + 1) // 60] = memory_mb(process)
        seconds, computed = time.perf_counter() - begin, processor_seconds(process) - computed
    quarter, last = memory.get(6, memory[min(memory)]), memory[max(memory)]
    return {"contracts": len(symbols), "hours": hours, "seconds": seconds, "simulator_processor_seconds": computed,
            "requests": client.requests,
            "requests_per_second": client.requests / seconds, "messages": client.messages, "refused": dict(client.refused),
            "memory_mb_hour_6": quarter, "memory_mb_last": last, "memory_ratio": last / quarter}


def main() -> None:
    "Start a simulator, replay, tell."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default="2025-09-20", help="first day, one with bars of five minutes")
    parser.add_argument("--hours", type=int, default=24)
    asked = parser.parse_args()
    end = datetime.fromisoformat(asked.start).replace(tzinfo=UTC) + timedelta(hours=asked.hours + 1)
    words = ["--port", "0", "--config", "defaults", "--start", asked.start, "--end", end.strftime("%Y-%m-%dT%H:%M:%S"),
             "--mode", "stepped", "--no-limits", "--key", KEY, "--secret", SECRET]
    with subprocess.Popen([XSMOM, "exchange", "simulate", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            print(line, end="", flush=True)
            print(json.dumps(asyncio.run(replayed(process, line.split()[0], asked.hours)), indent=1))
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
