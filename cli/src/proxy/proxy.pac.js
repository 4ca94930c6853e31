function tpHas(list, value) {
  for (var i = 0; list && i < list.length; i++) if (list[i] === value) return true;
  return false;
}
function tpBelow(list, host) {
  for (var i = 0; i < list.length; i++) {
    var end = "." + list[i];
    if (host.length > end.length && host.substring(host.length - end.length) === end) return true;
  }
  return false;
}
// Literal addresses only: isInNet of a name would resolve it.
function tpInside(ranges, host) {
  var four = /^\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}$/.test(host), six = host.indexOf(":") >= 0;
  for (var i = 0; i < ranges.length; i++) {
    var range = ranges[i];
    if (four && range.length === 2 && isInNet(host, range[0], range[1])) return true;
    if (six && range.length === 1 && typeof isInNetEx === "function" && isInNetEx(host, range[0])) return true;
  }
  return false;
}
function tpRule(rules, host) {
  return tpHas(rules.names, host) || tpBelow(rules.below, host) || tpInside(rules.ranges, host);
}
function tpService(service, namespace) {
  return Object.prototype.hasOwnProperty.call(tp.services, namespace) && tpHas(tp.services[namespace], service);
}
function tpName(host) {
  if (tpBelow(["svc"], host) || tpBelow(tp.suffixes, host) || tpHas(tp.suffixes, host)) return true;
  var labels = host.split(".");
  if (labels.length === 1) return (tp.anyLabelBut && !tpHas(tp.anyLabelBut, host)) || tpService(host, tp.namespace);
  if (labels.length === 2) {
    return tpService(labels[0], labels[1]) || (/^.+-\d+$/.test(labels[0]) && tpService(labels[1], tp.namespace));
  }
  return labels.length === 3 && tpService(labels[1], labels[2]);
}
function FindProxyForURL(url, host) {
  host = host.toLowerCase().replace(/^\[|\]$|\.$/g, "");
  if (host === "localhost" || tpBelow(["localhost"], host) || /^127\.[\d.]+$/.test(host) || host === "::1") return "DIRECT";
  if (tpRule(tp.never, host)) return "DIRECT";
  if (tp.everything || tpRule(tp.also, host) || tpInside(tp.ranges, host) || tpName(host)) return tp.proxy;
  return "DIRECT";
}
