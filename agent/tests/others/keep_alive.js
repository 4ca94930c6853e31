// usage: keep_alive.js serve NAME (prints its port) | call ADDRESS (200 requests as ada and as eve over few connections)
const http = require('http');
const [mode, argument] = process.argv.slice(2);

function serve(name) {
  const server = http.createServer((request, response) => {
    let size = 0;
    request.on('data', (piece) => { size += piece.length; });
    request.on('end', () => {
      response.setHeader('Trailer', 'X-Size');
      response.write(`${name} ${request.method} `);
      response.addTrailers({ 'X-Size': String(size) });
      response.end(`${request.url}`);
    });
  });
  server.listen(0, '127.0.0.1', () => console.log(server.address().port));
}

const sockets = new Set();

function one(agent, base, n) {
  const user = n % 3 === 0 ? 'ada' : 'eve';
  const size = n * 500;
  return new Promise((resolve, reject) => {
    const request = http.request(`http://${base}/${n}`, {
      agent, method: 'POST', headers: { 'X-Tp-User': user, ...(n % 2 ? { 'Content-Length': size } : {}) },
    }, (response) => {
      let text = '';
      response.on('data', (piece) => { text += piece; });
      response.on('end', () => {
        const wanted = `${user === 'ada' ? 'local' : 'app'} POST /${n}`;
        if (text !== wanted || response.trailers['x-size'] !== String(size)) {
          reject(new Error(`${text} ${JSON.stringify(response.trailers)}, not ${wanted} ${size}`));
        } else resolve();
      });
    });
    request.on('socket', (socket) => sockets.add(socket));
    request.on('error', reject);
    request.setTimeout(20000, () => request.destroy(new Error(`${n} timed out`)));
    request.end(Buffer.alloc(size, 'x'));
  });
}

async function call(base) {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 4 });
  await Promise.all(Array.from({ length: 200 }, (_, n) => one(agent, base, n)));
  agent.destroy();
  if (sockets.size > 4) throw new Error(`${sockets.size} connections for 200 requests`);
}

if (mode === 'serve') serve(argument);
else call(argument).catch((error) => { console.error(error); process.exit(1); });
