-- For wrk: posts the lines of a file in turn, `wrk ... -s load.lua URL -- FILE`, and ends with its figures as JSON.

local requests, last = {}, 0

function init(args)
  for line in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, nil, line)
  end
end

function request()
  last = last % #requests + 1
  return requests[last]
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '{"requests": %.0f, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "errors": %.0f}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
